"""What the commands of the command line do; `fastres.cli` imports each one only when it is called."""
