"""The forms other than chat completions in which applications ask and vendors answer; chat is the hub."""
