"""The recipe, the loop around it, its options, and how a run resumes."""
