"""Everything that is trained: the embedded models, and heads that help a drafter. Plain torch."""
