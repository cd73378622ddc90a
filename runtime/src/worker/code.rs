//! Gives back the pages of the program that only its start needed.
//!
//! All processes of a node share one copy of their program in the page cache, but every page that a process has mapped is
//! kept there and counts as its memory, and the kernel maps many around each that is touched. A page that is needed again
//! is mapped again, from the same cache.

#![allow(unsafe_code, reason = "the kernel is told an address; only pages that a file holds are given back")]

use std::ffi::c_void;
use std::ops::Range;

use rustix::mm::{Advice, madvise};

/// Unmaps all pages of files that this process can only read. Where it cannot be known which those are nothing is done.
pub(super) fn give_back() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return };
    for range in clean_code(&maps) {
        let start = std::ptr::with_exposed_provenance_mut::<c_void>(range.start);
        // SAFETY: nobody can write to the mapping and all its pages are those of its file, so that it reads the same after
        // this as before. If it was unmapped meanwhile, and something else lies there, that has another owner, who
        // has it at an address that the kernel chose: libraries are not unloaded while a worker runs.
        if let Err(error) = unsafe { madvise(start, range.len(), Advice::LinuxDontNeed) } {
            tracing::debug!(%error, "pages of the program stay mapped");
        }
    }
}

/// The mappings in `/proc/PID/smaps` of files that are read only and of which no page was ever written (by the dynamic
/// linker, or a debugger): what they show is in the file.
fn clean_code(smaps: &str) -> Vec<Range<usize>> {
    let mut clean = Vec::new();
    let mut present = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        match first.strip_suffix(':') {
            None => present = mapping(first, words),
            Some("Anonymous" | "Swap") if words.next() != Some("0") => present = None,
            // The last line of a mapping.
            Some("VmFlags") => clean.extend(present.take()),
            Some(_) => {}
        }
    }
    clean
}

/// `START-END rights offset device inode path`, if it is of a file that can only be read or run.
fn mapping<'a>(range: &str, mut rest: impl Iterator<Item = &'a str>) -> Option<Range<usize>> {
    let rights = rest.next()?;
    let inode = rest.nth(2)?;
    let (start, end) = range.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    (matches!(rights, "r-xp" | "r--p") && inode != "0").then_some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_in_a_file_unchanged_is_given_back() {
        let entry = |head: &str, anonymous: u32, swap: u32| {
            format!("{head}\nRss: 8 kB\nAnonymous: {anonymous} kB\nSwap: {swap} kB\nVmFlags: rd mr mw me\n")
        };
        let maps = [
            entry("1000-3000 r--p 00000000 fe:00 77   /bin/helio", 0, 0),
            entry("3000-6000 r-xp 00002000 fe:00 77   /bin/helio", 0, 0),
            entry("6000-7000 r--p 00005000 fe:00 77   /bin/helio", 4, 0),
            entry("7000-8000 r--p 00006000 fe:00 77   /bin/helio", 0, 4),
            entry("8000-9000 rw-p 00007000 fe:00 77   /bin/helio", 0, 0),
            entry("9000-a000 r--s 00000000 00:01 9    /memfd:object (deleted)", 0, 0),
            entry("a000-b000 r--p 00000000 00:00 0    [vvar]", 0, 0),
            entry("7fff000-8000000 r-xp 00000000 fe:00 9    /lib/libc.so.6", 0, 0),
        ];
        assert_eq!(clean_code(&maps.concat()), [0x1000..0x3000, 0x3000..0x6000, 0x7fff000..0x8000000]);
        let torn = clean_code("1000-3000 r-xp 00000000 fe:00 77 /bin/helio\nRss: 8 kB\n");
        assert!(torn.is_empty(), "{torn:?}");
    }

    #[test]
    fn a_process_goes_on_with_fewer_pages() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(2).unwrap().parse::<usize>().unwrap()
        };
        let before = resident();
        give_back();
        let after = resident();
        assert!(after < before, "{before} pages of files, then {after}");
    }
}
