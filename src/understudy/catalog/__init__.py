"""What models exist, can do, cost, and when they die; what could take over."""
