"""`python -m understudy`."""

from understudy.cli.main import run

if __name__ == "__main__":
    run()
