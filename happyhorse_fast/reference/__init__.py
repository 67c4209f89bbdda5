"""The eager reference: what every kernel is checked against, in plain torch."""
