"""The HTTP API: what each kind of client sends, made into one kind of request and back."""
