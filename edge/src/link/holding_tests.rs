//! The order in which the edge does what it is told, and what it says to providers of other releases.

use prost::Message;
use skerry_proto::link::{Change, CloudBulk, Synced, Upsert, change, cloud_bulk, edge_bulk};

use super::holding::*;
use super::*;

fn welcome(features: &[&str]) -> skerry_proto::link::Welcome {
    skerry_proto::link::Welcome {
        features: features.iter().map(|f| (*f).to_owned()).collect(),
        ..Default::default()
    }
}

fn digests() -> skerry_proto::link::Welcome {
    welcome(&[skerry_proto::link::FEATURE_DIGEST])
}

fn change(seq: u64) -> CloudBulk {
    CloudBulk {
        message: Some(cloud_bulk::Message::Change(Change {
            seq,
            change: Some(change::Change::Upsert(Upsert::default())),
        })),
    }
}

fn other(message: cloud_bulk::Message) -> CloudBulk {
    CloudBulk {
        message: Some(message),
    }
}

fn names(work: &[Work]) -> Vec<String> {
    work.iter()
        .map(|work| match work {
            Work::Commit { changes, seq } => format!("commit {} to {seq}", changes.len()),
            Work::Synced { seq } => format!("synced {seq}"),
            Work::Answer(_) => "answer".to_owned(),
            Work::Settle(results) => format!("settle {}", results.len()),
        })
        .collect()
}

#[test]
fn changes_before_a_question_are_committed_before_it_is_answered() {
    let mut holding = Holding::new(&digests());
    let messages = [
        change(1),
        other(cloud_bulk::Message::ReportResult(Default::default())),
        change(2),
        other(cloud_bulk::Message::InventoryRequest(Default::default())),
        change(3),
        other(cloud_bulk::Message::Synced(Synced { seq: 3 })),
    ];
    let work = holding.plan(messages).unwrap();
    assert_eq!(
        names(&work),
        ["commit 2 to 2", "answer", "commit 1 to 3", "synced 3", "settle 1"]
    );
}

#[test]
fn a_change_that_is_missing_or_comes_twice_ends_the_session() {
    for wrong in [1, 3] {
        let mut holding = Holding::new(&digests());
        holding.plan([change(1)]).unwrap();
        assert!(holding.plan([change(wrong)]).is_err(), "{wrong}");
    }
}

#[test]
fn an_older_provider_is_told_everything_and_nothing_that_it_does_not_know() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let holding = Holding::new(&welcome(&[]));
    let opening = holding.opening(&store).unwrap();
    assert_eq!(
        opening,
        [edge_bulk::Message::Inventory(skerry_proto::link::Inventory {
            entries: vec![],
            last: true
        })]
    );
    let edge_bulk::Message::Applied(applied) = holding.acknowledgement(&store, 3).unwrap() else {
        panic!("no acknowledgement");
    };
    // What the release before digests sent: field 1, the number.
    assert_eq!(applied.encode_to_vec(), [8, 3]);
    assert_eq!(holding.proof(&store, 3).unwrap(), None);
}

#[tokio::test]
async fn an_older_providers_session_is_obeyed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut holding = Holding::new(&welcome(&[]));
    let sent = include_bytes!("testdata/provider-0.1.bulk");
    let mut rest = sent.as_slice();
    let mut messages = Vec::new();
    while !rest.is_empty() {
        messages.push(CloudBulk::decode_length_delimited(&mut rest).unwrap());
    }
    let work = holding.plan(messages).unwrap();
    assert_eq!(names(&work), ["commit 3 to 3", "synced 3", "settle 1"]);
    for work in work {
        if let Work::Commit { changes, .. } = work {
            store.apply(changes).await.unwrap();
        }
    }
    let pods = store.list(skerry_proto::link::Kind::Pod).unwrap();
    assert_eq!(pods.len(), 1);
    assert_eq!(
        pods[0].decode::<serde_json::Value>().unwrap()["metadata"]["name"],
        "web"
    );
    assert_eq!(store.count(skerry_proto::link::Kind::Secret).unwrap(), 0);
}
