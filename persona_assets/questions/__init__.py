"""Multiple-choice question banks: the miniature world and ARC-Challenge."""
