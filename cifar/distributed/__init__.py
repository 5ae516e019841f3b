"""Processes and devices: the runtime, the launcher's environment, rendezvous, heartbeat, preemption, CPU settings."""
