"""What every test has: lab_plugin.py decides where it runs, left_out.py whether this machine has what it is about."""

pytest_plugins = ["lab_plugin", "left_out"]
