"""Fixtures and small models shared by the tests."""
