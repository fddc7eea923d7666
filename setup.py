"""What setup.cfg cannot say: every room of kdistill, and two folders beside it. Everything else is there."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["kdistill", "kdistill.*"]), "kdistill.recipes", "kdistill.exports"])
