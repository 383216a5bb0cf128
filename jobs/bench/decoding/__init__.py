"""The measurements of `hasten bench decode`, each with its table; imported when it runs."""
