"""Parameters from, and to, the layouts of other projects."""
