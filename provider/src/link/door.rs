//! Who shakes hands next, so that nobody who only takes places keeps others out.
//!
//! A handshake takes a place, and a peer may take its time over it. Peers wait by where they come from: a place that
//! comes free goes to the source that holds the fewest, and no source gets all of them. Many connections from one
//! address so wait for each other (a fleet behind one NAT as well as somebody who opens them for sport), and a site from
//! elsewhere waits for none of them.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};

/// Where a connection comes from: an IPv4 address, or the /64 that one IPv6 host may choose addresses from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source(IpAddr);

impl From<IpAddr> for Source {
    fn from(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from(u128::from(ip) >> 64 << 64)),
            ip => ip,
        })
    }
}

/// The queue before the handshakes.
pub(super) struct Door<T> {
    places: usize,
    /// Most places of one source.
    share: usize,
    /// Most that wait.
    room: usize,
    taken: usize,
    waiting: usize,
    sources: BTreeMap<Source, Line<T>>,
}

struct Line<T> {
    taken: usize,
    waiting: VecDeque<T>,
}

impl<T> Door<T> {
    /// With so many places, of which a source may hold three quarters, and room for so many who wait.
    pub(super) fn new(places: usize, room: usize) -> Self {
        Self {
            places,
            share: (places * 3 / 4).max(1),
            room,
            taken: 0,
            waiting: 0,
            sources: BTreeMap::new(),
        }
    }

    /// Somebody new. Answers who must go for want of room: the newest of the longest line.
    pub(super) fn arrive(&mut self, source: Source, peer: T) -> Option<T> {
        let line = self.sources.entry(source).or_insert_with(|| Line {
            taken: 0,
            waiting: VecDeque::new(),
        });
        line.waiting.push_back(peer);
        self.waiting += 1;
        if self.waiting <= self.room {
            return None;
        }
        let longest = self.sources.values_mut().max_by_key(|line| line.waiting.len())?;
        self.waiting -= 1;
        longest.waiting.pop_back()
    }

    /// Who shakes hands now, if there is a place; it is given back with [`Door::done`].
    pub(super) fn next(&mut self) -> Option<(Source, T)> {
        if self.taken >= self.places {
            return None;
        }
        let able = |line: &Line<T>| !line.waiting.is_empty() && line.taken < self.share;
        let (source, line) = self
            .sources
            .iter_mut()
            .filter(|(_, line)| able(line))
            .min_by_key(|(_, line)| line.taken)?;
        let peer = line.waiting.pop_front()?;
        line.taken += 1;
        self.taken += 1;
        self.waiting -= 1;
        Some((*source, peer))
    }

    /// A handshake is over, however it ended.
    pub(super) fn done(&mut self, source: Source) {
        let Some(line) = self.sources.get_mut(&source) else {
            return;
        };
        line.taken = line.taken.saturating_sub(1);
        self.taken = self.taken.saturating_sub(1);
        if line.taken == 0 && line.waiting.is_empty() {
            self.sources.remove(&source);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(last: u8) -> Source {
        Source::from(IpAddr::from([192, 0, 2, last]))
    }

    #[test]
    fn whoever_holds_the_fewest_places_is_next_and_nobody_holds_all() {
        let mut door = Door::new(8, 100);
        for number in 0..20 {
            assert_eq!(door.arrive(source(1), number), None);
        }
        let mut admitted = 0;
        while door.next().is_some() {
            admitted += 1;
        }
        assert_eq!(admitted, 6);
        door.arrive(source(2), 100);
        door.arrive(source(3), 200);
        assert_eq!(door.next(), Some((source(2), 100)));
        assert_eq!(door.next(), Some((source(3), 200)));
        assert_eq!(door.next(), None);
        door.done(source(1));
        assert_eq!(door.next(), Some((source(1), 6)));
    }

    #[test]
    fn for_want_of_room_the_longest_line_loses_its_newest() {
        let mut door = Door::new(1, 3);
        door.arrive(source(1), "a");
        assert_eq!(door.next(), Some((source(1), "a")));
        for name in ["b", "c", "d"] {
            assert_eq!(door.arrive(source(1), name), None);
        }
        assert_eq!(door.arrive(source(2), "x"), Some("d"));
        assert_eq!(door.arrive(source(1), "e"), Some("e"));
        door.done(source(1));
        assert_eq!(door.next(), Some((source(1), "b")));
        door.done(source(1));
        assert_eq!(door.next(), Some((source(1), "c")));
        door.done(source(1));
        assert_eq!(door.next(), Some((source(2), "x")));
        door.done(source(2));
        assert!(door.sources.is_empty() && door.waiting == 0 && door.taken == 0);
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one_source() {
        let from = |text: &str| Source::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(from("2001:db8::1"), from("2001:db8::ffff:2"));
        assert_ne!(from("2001:db8::1"), from("2001:db8:0:1::1"));
        assert_eq!(from("::ffff:192.0.2.7"), source(7));
    }
}
