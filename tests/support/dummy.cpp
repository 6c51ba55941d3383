// Keeps the library target non-empty.
