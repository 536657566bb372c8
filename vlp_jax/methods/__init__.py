"""One file a paper. Start here."""
