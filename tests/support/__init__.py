"""What several kinds of tests need: peers, moves, deadlines, tables."""
