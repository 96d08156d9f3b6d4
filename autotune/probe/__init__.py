"""Parent: start, time, limit and end a worker. Child: run the workload, report facts."""
