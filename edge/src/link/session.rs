//! One session: greeting, heartbeats, changes down, reports up.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use skerry_proto::limits::{CHANGE_WINDOW, MAX_MESSAGE_BYTES, REPORT_WINDOW};
use skerry_proto::link::link_client::LinkClient;
use skerry_proto::link::report_result::Outcome;
use skerry_proto::link::{
    BulkHello, CloudBulk, CloudControl, EdgeBulk, EdgeControl, FEATURE_DIGEST, Heartbeat, Hello,
    PROTOCOL_MAX, PROTOCOL_MIN, Report, ReportResult, Welcome, change, cloud_control, edge_bulk,
    edge_control, heartbeat,
};
use skerry_transport::{Lane, Lines};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::beats::{self, Beats};
use super::critical::Critical;
use super::holding::{Holding, Work};
use super::tunnel::{self, Cloud, serve};
use super::uplink::{HeldBack, in_turns};
use super::{Link, SessionError};
use crate::store::{Store, StoreError};

/// How long the provider may take for its first answer.
const GREETING_LIMIT: Duration = Duration::from_secs(15);
/// Pause before a failed commit is tried again; a full disk does not empty itself quickly.
const COMMIT_RETRY: Duration = Duration::from_secs(5);
const CONTROL_QUEUE: usize = 64;
const BULK_QUEUE: usize = 64;

/// Tries one session; returns why it could not be had or ended.
pub(super) async fn run(link: &Arc<Link>) -> SessionError {
    match attempt(link).await {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

enum Never {}

async fn attempt(link: &Arc<Link>) -> Result<Never, SessionError> {
    let lines = Lines::default();
    let (to_control, mut control, welcome) = greet(link, &lines).await?;
    let mut beats = Beats::new(&welcome, &lines);
    link.metrics.set_class(beats.class());
    let holding = Holding::new(&welcome);
    let (to_bulk, bulk, client) = open_bulk(link, &welcome, &holding, &lines).await?;
    link.note_online(&welcome);
    tracing::info!(session = %welcome.session, provider = %welcome.version, "the link is up");

    let window = Arc::new(Semaphore::new(REPORT_WINDOW));
    let mut parts = JoinSet::new();
    parts.spawn(receive(
        Arc::clone(link),
        holding,
        bulk,
        to_bulk.clone(),
        Arc::clone(&window),
    ));
    let critical = Critical::new(&welcome);
    parts.spawn(report(Arc::clone(link), critical.clone(), to_bulk, window));
    parts.spawn(critical.clone().run(Arc::clone(link), to_control.clone()));
    let (to_settle, results) = mpsc::channel(CONTROL_QUEUE);
    parts.spawn(critical.settle(Arc::clone(link), results));
    let (followed, line) = (Arc::clone(link), lines.clone());
    parts.spawn(async move {
        followed.uplink.follow(&line, &followed.thrift).await;
        SessionError::Protocol("the uplink is watched no more")
    });
    let mut tunnels = JoinSet::new();
    let mut told_drops = super::drops::Told::default();
    loop {
        tokio::select! {
            Some(ended) = parts.join_next() => match ended {
                Ok(error) => return Err(error),
                Err(_) => return Err(SessionError::Protocol("a part of the session failed")),
            },
            message = control.message() => {
                beats.heard();
                let message = message?.ok_or(SessionError::Protocol("the control stream ended"))?;
                match message.message {
                    Some(cloud_control::Message::HeartbeatAck(ack)) => {
                        if let Some(took) = beats.acknowledged(ack.seq) {
                            link.metrics.observe_heartbeat(beats.class(), took);
                        }
                    }
                    Some(cloud_control::Message::OpenTunnel(order)) => {
                        let (streams, session) = (Arc::clone(&link.streams), welcome.session.clone());
                        let open = link.metrics.tunnel();
                        let class = tunnel::class_of(&link.store, &order);
                        let cloud = Cloud { client: client.clone(), session, to_control: to_control.clone() };
                        let serving = serve(cloud, streams, order, (link.uplink.clone(), class));
                        tunnels.spawn(async move {
                            serving.await;
                            drop(open);
                        });
                    }
                    Some(cloud_control::Message::Goodbye(bye)) => return Err(SessionError::Goodbye {
                        reason: bye.reason,
                        retry_after: Duration::from_millis(bye.retry_after_millis.into()),
                    }),
                    // The queue holds more than the window lets out.
                    Some(cloud_control::Message::ReportResult(result)) => drop(to_settle.try_send(result)),
                    Some(cloud_control::Message::Retime(retime)) => {
                        beats.retime(&retime);
                        link.metrics.set_class(beats.class());
                    }
                    Some(cloud_control::Message::ReportNode(_)) => link.note_node_asked(),
                    Some(cloud_control::Message::RenewCertificate(_)) => link.dial.renewal_wanted(),
                    // Something newer than this build.
                    Some(cloud_control::Message::Welcome(_)) | None => {}
                }
            }
            () = tokio::time::sleep_until(beats.wake()) => {
                let Some(seq) = beats.beat()? else { continue };
                let beat = heartbeat(link, seq, &beats, &mut told_drops);
                let message = EdgeControl { message: Some(edge_control::Message::Heartbeat(beat)) };
                if to_control.try_send(message).is_err() {
                    return Err(SessionError::Protocol("the provider does not read its control stream"));
                }
            }
            Some(_) = tunnels.join_next() => {}
        }
    }
}

fn heartbeat(link: &Link, seq: u64, beats: &Beats, told_drops: &mut super::drops::Told) -> Heartbeat {
    let drops = link.store.drops().unwrap_or_default();
    let gate = link.uplink.gate();
    let shed = link.uplink.shed();
    link.metrics.set_shed(shed);
    Heartbeat {
        seq,
        outbox: link.store.outbox_len().unwrap_or(0),
        dropped: drops.iter().map(|(_, _, count)| count).sum(),
        drops: told_drops.news(&drops),
        round_trip_micros: beats.round_trip_micros(),
        saturated: gate.saturated,
        shed,
        used_today: link.thrift.used_today(),
        deferring: heartbeat::Deferring::from(gate.deferring).into(),
    }
}

type Control = (mpsc::Sender<EdgeControl>, Streaming<CloudControl>, Welcome);

async fn greet(link: &Link, lines: &Lines) -> Result<Control, SessionError> {
    let (channel, line) = link.dial.dial_line().await.map_err(SessionError::Dial)?;
    let (sender, queue) = mpsc::channel(CONTROL_QUEUE);
    let hello = Hello {
        site: link.greeting.site.to_string(),
        protocol_max: PROTOCOL_MAX,
        protocol_min: PROTOCOL_MIN,
        version: link.greeting.version.clone(),
        boot_id: link.greeting.boot_id.clone(),
        store_id: link.store.id().to_owned(),
        now_unix_nanos: i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX),
        features: vec![FEATURE_DIGEST.to_owned(), "retime".to_owned()],
        incarnation: link.greeting.incarnation,
        instance: link.greeting.instance.clone(),
    };
    // The queue is new and has room.
    let _ = sender.try_send(EdgeControl {
        message: Some(edge_control::Message::Hello(hello)),
    });
    let answer = async {
        let mut stream = client(channel)
            .control(ReceiverStream::new(queue))
            .await?
            .into_inner();
        let first = stream.message().await?;
        match first.and_then(|m| m.message) {
            Some(cloud_control::Message::Welcome(welcome)) => Ok((stream, welcome)),
            Some(cloud_control::Message::Goodbye(bye)) => Err(SessionError::Goodbye {
                reason: bye.reason,
                retry_after: Duration::from_millis(bye.retry_after_millis.into()),
            }),
            _ => Err(SessionError::Protocol("its first message was no Welcome")),
        }
    };
    let (stream, welcome) = tokio::time::timeout(GREETING_LIMIT, answer)
        .await
        .map_err(|_| SessionError::Silent(GREETING_LIMIT))??;
    beats::note_line(lines, Lane::Control, line, &welcome);
    if let Ok(now) = Timestamp::from_nanosecond(i128::from(welcome.now_unix_nanos)) {
        link.dial.greeted(now);
    }
    Ok((sender, stream, welcome))
}

type BulkParts = (mpsc::Sender<EdgeBulk>, Streaming<CloudBulk>, LinkClient<Channel>);

/// Opens the second connection and tells what the store holds.
async fn open_bulk(
    link: &Link,
    welcome: &Welcome,
    holding: &Holding,
    lines: &Lines,
) -> Result<BulkParts, SessionError> {
    let (channel, line) = link.dial.dial_line().await.map_err(SessionError::Dial)?;
    beats::note_bulk(lines, line, welcome, &link.bulk);
    let client = client(channel);
    let (sender, queue) = mpsc::channel(BULK_QUEUE);
    let opening = read_store(link, holding, Holding::opening).await?;
    let hello = edge_bulk::Message::Hello(BulkHello {
        session: welcome.session.clone(),
    });
    let _ = sender.try_send(EdgeBulk { message: Some(hello) });
    let feed = sender.clone();
    // Runs beside the call: the queue is shorter than a large inventory. A closed queue shows as the call's error.
    let parts = async move {
        let _ = send_all(&feed, opening).await;
    };
    let mut caller = client.clone();
    let call = async { caller.bulk(ReceiverStream::new(queue)).await };
    let both = async { tokio::join!(call, parts).0 };
    let stream = tokio::time::timeout(GREETING_LIMIT, both)
        .await
        .map_err(|_| SessionError::Silent(GREETING_LIMIT))??
        .into_inner();
    Ok((sender, stream, client))
}

/// Reads much of the store, where blocking is allowed.
async fn read_store<T: Send + 'static>(
    link: &Link,
    holding: &Holding,
    read: impl FnOnce(&Holding, &Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, SessionError> {
    let (store, holding) = (link.store.clone(), holding.clone());
    let read = tokio::task::spawn_blocking(move || read(&holding, &store)).await;
    Ok(read.map_err(|_| SessionError::Protocol("the store was not read"))??)
}

const BULK_ENDED: SessionError = SessionError::Protocol("the bulk stream ended");

async fn send_all(
    to_bulk: &mpsc::Sender<EdgeBulk>,
    messages: impl IntoIterator<Item = edge_bulk::Message>,
) -> Result<(), SessionError> {
    for message in messages {
        let message = EdgeBulk {
            message: Some(message),
        };
        to_bulk.send(message).await.map_err(|_| BULK_ENDED)?;
    }
    Ok(())
}

fn client(channel: Channel) -> LinkClient<Channel> {
    LinkClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// Takes changes into the store, batched as they come, and settles reports. Returns why it ended.
async fn receive(
    link: Arc<Link>,
    mut holding: Holding,
    bulk: Streaming<CloudBulk>,
    to_bulk: mpsc::Sender<EdgeBulk>,
    window: Arc<Semaphore>,
) -> SessionError {
    let batch = usize::try_from(CHANGE_WINDOW).unwrap_or(1);
    let mut batches = bulk.ready_chunks(batch);
    while let Some(messages) = batches.next().await {
        let taken = async {
            let messages = messages.into_iter().collect::<Result<Vec<_>, _>>()?;
            for work in holding.plan(messages)? {
                carry_out(&link, &holding, work, &to_bulk, &window).await?;
            }
            Ok(())
        };
        if let Err(error) = taken.await {
            return error;
        }
    }
    BULK_ENDED
}

async fn carry_out(
    link: &Link,
    holding: &Holding,
    work: Work,
    to_bulk: &mpsc::Sender<EdgeBulk>,
    window: &Semaphore,
) -> Result<(), SessionError> {
    match work {
        Work::Commit { changes, seq } => {
            commit(link, changes).await;
            send_all(to_bulk, [holding.acknowledgement(&link.store, seq)?]).await
        }
        Work::Synced { seq } => {
            link.note_synced();
            send_all(to_bulk, holding.proof(&link.store, seq)?).await
        }
        Work::Answer(request) => {
            let answer = move |holding: &Holding, store: &Store| holding.answer(store, &request);
            let answer = read_store(link, holding, answer).await?;
            send_all(to_bulk, answer).await
        }
        Work::Settle(results) => {
            settle(link, &results, window).await;
            Ok(())
        }
    }
}

/// Commits, again and again while the store refuses: without the commit there is no acknowledgement.
async fn commit(link: &Link, changes: Vec<change::Change>) {
    while let Err(error) = link.store.apply(changes.clone()).await {
        complain(&error);
        tokio::time::sleep(COMMIT_RETRY).await;
    }
}

fn complain(error: &StoreError) {
    tracing::error!(%error, "changes from the provider cannot be stored; running pods are not touched. Is the disk full?");
}

pub(super) async fn settle(link: &Link, results: &[ReportResult], window: &Semaphore) {
    for result in results.iter().filter(|r| r.outcome() == Outcome::Dropped) {
        tracing::warn!(seq = result.seq, reason = %result.message, "the provider will never take a report; it is dropped");
    }
    for result in results {
        tracing::debug!(seq = result.seq, "a report was settled");
    }
    let (refused, taken): (Vec<_>, Vec<_>) = results.iter().partition(|r| r.outcome() == Outcome::Dropped);
    let numbers = |results: Vec<&ReportResult>| results.iter().map(|r| r.seq).collect::<Vec<_>>();
    let (refused, taken) = (numbers(refused), numbers(taken));
    while let Err(error) = link.store.settle_reports(taken.clone()).await {
        complain(&error);
        tokio::time::sleep(COMMIT_RETRY).await;
    }
    while !refused.is_empty()
        && let Err(error) = link.store.refuse_reports(refused.clone()).await
    {
        complain(&error);
        tokio::time::sleep(COMMIT_RETRY).await;
    }
    window.add_permits(results.len());
}

/// Sends what waits in the outbox, oldest first, at most [`REPORT_WINDOW`] ahead of the results.
async fn report(
    link: Arc<Link>,
    critical: Critical,
    to_bulk: mpsc::Sender<EdgeBulk>,
    window: Arc<Semaphore>,
) -> SessionError {
    let mut moved = link.store.outbox_moved();
    let mut after = 0;
    let mut held = HeldBack::new(&link.uplink);
    loop {
        moved.mark_unchanged();
        let waiting = link.store.waiting_reports(after, REPORT_WINDOW);
        let waiting = waiting.and_then(|mut waiting| {
            after = waiting.last().map_or(after, |last| last.seq);
            waiting.extend(held_back(&link, held.released())?);
            Ok(waiting)
        });
        let waiting = match waiting {
            Ok(waiting) => waiting,
            Err(error) => return error.into(),
        };
        if waiting.is_empty() {
            tokio::select! {
                changed = moved.changed() => if changed.is_err() {
                    return SessionError::Protocol("the store was closed");
                },
                () = held.release() => {}
            }
        }
        for report in in_turns(waiting) {
            if critical.takes(&report) || held.holds(&report) {
                continue;
            }
            let Ok(permit) = window.acquire().await else {
                return SessionError::Protocol("the session ended");
            };
            // Comes back with the report's result.
            permit.forget();
            tracing::debug!(seq = report.seq, "a report goes out");
            if to_bulk
                .send(EdgeBulk {
                    message: Some(edge_bulk::Message::Report(report)),
                })
                .await
                .is_err()
            {
                return SessionError::Protocol("the bulk stream ended");
            }
        }
    }
}

/// Those of the reports that still wait: others were replaced by newer ones.
fn held_back(link: &Link, seqs: BTreeSet<u64>) -> Result<Vec<Report>, StoreError> {
    let mut found = Vec::new();
    for seq in seqs {
        let next = link.store.waiting_reports(seq - 1, 1)?;
        found.extend(next.into_iter().filter(|report| report.seq == seq));
    }
    Ok(found)
}
