"""Policies on one host: following the control log, choosing, planning, changing, and answering."""
