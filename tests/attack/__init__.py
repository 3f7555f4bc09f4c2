"""The campaign: hostile files, kills, full disks and rival writers against every command. See docs/attacks.md."""
