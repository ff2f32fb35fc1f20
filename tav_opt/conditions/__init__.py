"""What an edit is told beside its prompt."""
