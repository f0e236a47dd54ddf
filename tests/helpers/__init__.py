"""What several test files need: small models, random inputs, checks."""
