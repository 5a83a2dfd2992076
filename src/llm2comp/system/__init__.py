"""What the machine gives: files written in one step, the user's cache, the console, the Hub."""
