"""Device mesh, sharding rules and collectives."""
