"""What a machine and a schedule will do, before they do it: workloads, replay, reports, measured costs, rooflines."""
