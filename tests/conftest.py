"""What every test has: lab_plugin.py decides where it runs."""

pytest_plugins = ["lab_plugin"]
