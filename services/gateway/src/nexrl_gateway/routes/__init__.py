"""The endpoints: each parses, calls one function, returns."""
