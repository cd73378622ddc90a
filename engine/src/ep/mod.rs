//! The expert-parallel group as one rank sees it: step headers, expert slots, dispatch and combine.
