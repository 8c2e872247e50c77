"""Who may connect, how they prove it, and what they may see."""
