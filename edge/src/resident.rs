//! What the daemon keeps in memory while it has nothing to do.
//!
//! A site's machine is small, and the daemon idles most of its life. Three things keep memory that nobody uses: the
//! allocator's arenas, one for each thread that ever allocated at the same time as another; memory that was freed but is
//! held back for the next request; and the program's own pages. Of these the kernel maps sixteen around each one that is
//! touched, so that after the start nearly the whole program counts as resident, while the idle daemon uses a quarter of it.
//!
//! So there is one arena, and now and then freed memory and the program's pages are given back. What is needed again comes
//! from the page cache, a few hundred faults of a microsecond each.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// When memory is given back for the first time: what the start needs is over.
const FIRST: Duration = Duration::from_secs(10);
/// How often it is given back then.
const EVERY: Duration = Duration::from_secs(10 * 60);

/// Makes all threads share one arena of the allocator. To be called before there is a second thread.
#[allow(unsafe_code)]
pub fn one_arena() {
    // The daemon's few threads allocate too seldom to stand in each other's way.
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number of the allocator's.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1);
    }
}

/// Gives back what is not used, again and again until `stop`.
pub async fn run(stop: CancellationToken) {
    let mut pause = FIRST;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = EVERY;
        // Walks through all that is free; with thousands of pods that takes a moment.
        if tokio::task::spawn_blocking(give_back).await.is_err() {
            return;
        }
    }
}

/// Gives freed memory and the program's own pages back to the kernel.
#[allow(unsafe_code)]
fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: frees what is free already.
    unsafe {
        nix::libc::malloc_trim(0);
    }
    let (Ok(maps), Ok(program)) = (
        std::fs::read_to_string("/proc/self/maps"),
        std::fs::read_link("/proc/self/exe"),
    ) else {
        return;
    };
    for (from, to) in unwritten(&maps, &program.to_string_lossy()) {
        // SAFETY: the range is a mapping of the program's file that nothing has ever written to, and that lives as long as
        // the process: what is read there next comes from the file, which cannot be changed while it runs (ETXTBSY).
        unsafe {
            let start = std::ptr::with_exposed_provenance_mut(from);
            nix::libc::madvise(start, to - from, nix::libc::MADV_DONTNEED);
        }
    }
}

/// The ranges of a process's `maps` that hold the program's code and constants as they are in its file. Never what the
/// dynamic linker has written its addresses into: that is readable only as well, but begins elsewhere in the file.
fn unwritten(maps: &str, program: &str) -> Vec<(usize, usize)> {
    let range = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (from, to) = fields.next()?.split_once('-')?;
        let (mode, offset) = (fields.next()?, fields.next()?);
        let file = line.split_once('/').map(|(_, rest)| rest);
        let offset = u64::from_str_radix(offset, 16).ok()?;
        let whole = mode == "r-xp" || (mode == "r--p" && offset == 0);
        (whole && file == program.strip_prefix('/')).then_some(())?;
        Some((
            usize::from_str_radix(from, 16).ok()?,
            usize::from_str_radix(to, 16).ok()?,
        ))
    };
    maps.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0000000-55d0c0275000 r--p 00000000 fe:00 7                          /opt/my edge/skerry-edge
55d0c0275000-55d0c0ba0000 r-xp 00274000 fe:00 7                          /opt/my edge/skerry-edge
55d0c0ba1000-55d0c0bdc000 r--p 00b9f000 fe:00 7                          /opt/my edge/skerry-edge
55d0c0bdc000-55d0c0be0000 rw-p 00bda000 fe:00 7                          /opt/my edge/skerry-edge
55d0c1000000-55d0c1060000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000026000 r--p 00000000 fe:00 9                          /usr/lib/libc.so.6
7f0000026000-7f0000186000 r-xp 00026000 fe:00 9                          /usr/lib/libc.so.6
";

    #[test]
    fn only_what_is_as_in_the_programs_file_is_given_back() {
        assert_eq!(
            unwritten(MAPS, "/opt/my edge/skerry-edge"),
            [
                (0x55d0_c000_0000, 0x55d0_c027_5000),
                (0x55d0_c027_5000, 0x55d0_c0ba_0000)
            ]
        );
        assert_eq!(unwritten(MAPS, "/opt/my edge/skerry-edge (deleted)"), []);
        assert_eq!(unwritten("garbage\n1-2\n", "/x"), []);
    }

    #[test]
    fn a_process_works_on_after_it_gave_its_own_pages_back() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let program = std::fs::read_link("/proc/self/exe").unwrap();
        assert!(!unwritten(&maps, &program.to_string_lossy()).is_empty());
        let before: Vec<String> = (0..1000).map(|n| format!("{n:?}")).collect();
        give_back();
        assert_eq!(before, (0..1000).map(|n: u32| n.to_string()).collect::<Vec<_>>());
    }
}
