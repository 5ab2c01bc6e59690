"""``python -m spectreg_lab.cli``, as launchers of several processes want it."""

from spectreg_lab.cli import main

main()
