"""What stores in a SQL database share: tables, queries and writes. Each function takes a connection and runs within the
transaction of its caller. It checks everything before it writes: a DomainError leaves nothing behind."""
