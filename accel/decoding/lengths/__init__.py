"""Draft lengths: how many tokens a drafter may propose before a pass of the target, and which of them are verified."""
