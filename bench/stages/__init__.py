"""The stages of the campaign, a file each with ``cases(setting)``: measurements by name, in order of importance."""
