"""What this machine's devices are (NVML, ROCm, CPU), and which of them is meant."""
