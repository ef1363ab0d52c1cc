"""The demo: real experts on real bases, checked, merged and judged in under a minute."""
