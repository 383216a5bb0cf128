"""Training objectives of drafting modules: functions of logits and of the target's recorded distribution."""
