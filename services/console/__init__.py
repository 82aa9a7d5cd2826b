"""The console: what people look at while agents learn. It reads what runs record, and writes nothing of theirs."""
