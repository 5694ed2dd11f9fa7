"""Objects that a user makes: TLS credentials, secrets, rules of who may come."""
