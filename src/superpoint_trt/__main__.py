"""`python -m superpoint_trt` is the command `superpoint`."""

from superpoint_trt.cli.main import main

main()
