"""Doctor: what is known to make merges garbage, looked for before a merge and after it."""
