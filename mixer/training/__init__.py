"""The step, the loop, its options, and how a run resumes."""
