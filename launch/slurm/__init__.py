"""Slurm: the script of a job, the queue it goes to, and what became of it. `launch/submit.py` is the entry."""
