"""What of a study goes to places outside, and what has got there."""
