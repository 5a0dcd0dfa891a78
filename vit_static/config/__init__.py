"""Typed configuration: schema, YAML files, overrides."""
