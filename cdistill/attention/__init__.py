"""What a teacher and its students look at: attention compared, exchanged and drawn, a slice at a time."""
