"""Operators registered the way a user would, in a package of their own; seqloom reaches them by name (`module:function`)."""
