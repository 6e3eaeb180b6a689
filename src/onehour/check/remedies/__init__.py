"""Mechanical remedies: small edits of the user's own lines, given as a diff and never made in place."""
