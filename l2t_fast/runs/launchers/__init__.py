"""Where the trainings of a table run: processes of this machine, a Ray cluster, jobs of Slurm by submitit."""
