"""The agent of one host: it offers slots, starts groups on them, and keeps the ledger true."""
